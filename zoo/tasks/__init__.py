"""LightningModules, one per task, and the callbacks that go with them; they wrap networks and know no model by name."""
