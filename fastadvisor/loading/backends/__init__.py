"""Interchangeable ways to make batches: from device memory (resident), files (dataloader, dali), or noise (synthetic)."""
