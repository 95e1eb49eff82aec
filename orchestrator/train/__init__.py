"""The loop, its schedule, and what watches over it. It knows an engine and batches, and nothing of the cluster."""
