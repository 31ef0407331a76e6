"""Compare aioecho with socketserver and others: `python -m benchmarks [run|report|list]`.

Every server is a process of its own, written as a user of its framework would write it, and loaded by `aioecho.load`.
"""
