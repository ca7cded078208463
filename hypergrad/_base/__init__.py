"""What every other part uses: trees, tracing, the compiler, errors, checks.  Not part of the public API."""
