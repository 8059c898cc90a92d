"""What the console shows, read across tenants. Changes go through `shared.jobs` and `shared.versions`."""
