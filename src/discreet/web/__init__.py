"""Read-only pages over report and ledger: server-side templates, one stylesheet, no JavaScript."""
