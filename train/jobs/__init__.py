"""What can be trained: one module with a forward that returns loss terms, per job."""
