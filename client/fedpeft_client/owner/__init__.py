"""The owner's side: the policy, its limits, sensors and metrics."""
