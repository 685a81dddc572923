"""Images in, batches out; plain dataclasses except for the modules that Lightning drives."""
