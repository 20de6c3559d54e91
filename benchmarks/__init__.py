"""Scripts that measure, and one package, `benchmarks.gpu`; run from the root of the repository."""
