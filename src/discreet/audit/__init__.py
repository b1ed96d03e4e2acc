"""The attack that a model must survive before release: planted canaries, membership scores, recitation, and what they prove."""
