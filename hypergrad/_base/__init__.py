"""What every other part uses: trees, tracing, the compiler, errors, checks.  Not for users."""
