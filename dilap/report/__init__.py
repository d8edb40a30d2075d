"""What runs measured, for people (one HTML file, Markdown) and for programs (CSV, differences as JSON).

For example:

    from dilap.report.report import Report

    made = Report.of([Path("runs/mine")])
    print(made.markdown())
"""
