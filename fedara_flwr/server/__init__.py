"""The server's half: who is there, who trains, what comes back, what is kept."""
