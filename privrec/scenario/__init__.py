"""One scenario file, read into typed values."""
