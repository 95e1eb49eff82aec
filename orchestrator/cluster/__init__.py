"""Ray: where processes run. It schedules and does not remember; what is done lies in the stages' folders."""
