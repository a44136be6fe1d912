"""A relay: the agent of an edge, whose worker has the edge's server collect updates in place of training."""
