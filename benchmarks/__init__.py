"""What the library costs and what it brings, measured beside others."""
