"""What a device is, what it allows and what it keeps between messages. No torch."""
