"""Which data exists, who may use it for what, what came from what, and how it is forgotten."""
