"""Updates on their way in: transfer slots, chunks, and the steps from a stream to a receipt."""
