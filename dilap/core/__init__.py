"""The values that every other room speaks in: what a network's shape is, what a plan keeps, what was measured.

No torch, and Python 3.10: this room travels to devices with `dilap.backends`, as it is.

    from dilap.core.workload import Budget
    Budget.parse("70%").limit_seconds(dense_seconds=0.020)  # 0.014
"""
