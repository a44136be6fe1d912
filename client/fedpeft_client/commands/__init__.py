"""Commands beside taking part: enroll, leave, status, egress log, dry run."""
