"""Many runs: started, resumed, collected, ranked. Imports torch only where it is needed."""
