"""One thread that owns the device: schedule → step → advance → publish. Knows nothing of HTTP."""
