"""What needs the running server: its fixtures live as long as this package of tests."""
