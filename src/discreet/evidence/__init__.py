"""The tamper-evident log: trees, signed notes, statements, and bundles that anyone can check offline. It knows nothing of privacy."""
