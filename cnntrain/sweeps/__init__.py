"""Many runs: collected, ranked, reported. Importing this imports nothing heavy."""
