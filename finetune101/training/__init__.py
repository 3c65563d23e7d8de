"""Training: optimizer and schedules, the loop, named recipes, and what makes a CPU's step fast."""
