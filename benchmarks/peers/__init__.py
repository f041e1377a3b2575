"""The parts of benchmarks/peers_cpu.py: instruction sets, what is timed, and its result rows."""
