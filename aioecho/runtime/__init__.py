"""What everything stands on: stepping coroutines, threads, event loops, standard streams, the rate-limited log."""
