"""The log of everything that leaves this device."""
