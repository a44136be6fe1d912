"""gRPC, on either side: channels, statuses, and the protocol's messages as values."""
