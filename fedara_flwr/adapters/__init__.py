"""What a client trains: PEFT's B·diag(E)·A layers on a frozen backbone. torch and peft, no flwr."""
