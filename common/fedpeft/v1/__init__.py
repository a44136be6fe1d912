"""The wire protocol, generated from `protos/fedpeft/v1`."""
