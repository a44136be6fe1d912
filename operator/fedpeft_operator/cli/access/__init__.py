"""Commands about identities, tokens, clients and the audit log."""
