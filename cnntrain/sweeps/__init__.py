"""Many runs: started, resumed, collected, ranked. Nothing here imports torch before it is needed."""
