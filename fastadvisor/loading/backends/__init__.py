"""The interchangeable ways to make batches: from device memory (resident), or from files (dataloader, dali, synthetic)."""
