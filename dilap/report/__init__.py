"""What runs measured, for people (one HTML file, Markdown) and for programs (CSV, differences as JSON)."""
