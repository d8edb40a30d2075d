"""The data types that all other packages share: shapes of networks, plans, costs, workloads, budgets, measurements.

This package imports no torch and runs on Python 3.10, because it is copied to devices together with `dilap.backends`.

    from dilap.core.workload import Budget
    Budget.parse("70%").limit_seconds(dense_seconds=0.020)  # 0.014
"""
