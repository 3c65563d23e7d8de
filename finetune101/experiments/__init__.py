"""Many runs: studies and searches; every point is a run, chosen on validation."""
