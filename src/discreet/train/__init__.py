"""Training: one differentially private step, state that resumes, the loop around them (extra: train)."""
