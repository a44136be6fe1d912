"""The process that trains and evaluates, and its handle in the agent."""
