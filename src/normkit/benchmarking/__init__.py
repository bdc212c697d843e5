"""How fast normalizers are: a grid of cases, peers found in the environment, one process for each.

`normkit bench` runs it. A :class:`~normkit.benchmarking.cases.Case` is data; a
:class:`~normkit.benchmarking.peers.Peer` says how to compute it and is asked in a process of its own
(:mod:`~normkit.benchmarking.worker`); :func:`~normkit.benchmarking.harness.measure` checks the outputs
(:mod:`~normkit.benchmarking.exact`), takes the times and returns
:class:`~normkit.benchmarking.results.Measurements`.
"""
