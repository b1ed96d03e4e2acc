"""A fleet that trains together and shows nobody its data (extra: federated)."""
