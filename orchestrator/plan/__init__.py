"""What has to be done: fingerprints, records of what is finished, and the plan. Needs neither torch nor a GPU."""
