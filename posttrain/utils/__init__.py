"""What has nothing to do with training: small files, caches, text."""
