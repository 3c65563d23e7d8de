"""What happens to the program when machines and files are at fault; ``benchmarks/stress.py`` runs the parts."""
