"""What `zoo evaluate` and `zoo compare` do, callable from Python: `restorers` and `generators`."""
