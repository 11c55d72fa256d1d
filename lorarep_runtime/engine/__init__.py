"""Who computes when: requests, the scheduler and the step loop."""
