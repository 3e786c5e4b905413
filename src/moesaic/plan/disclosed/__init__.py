"""What makers and users disclosed beside what this planner says: sizes, hours, costs, speeds. No torch here.

accounting: rows that follow from counting | speed: rows that need efficiencies | fit: three constants, fitted to other
rows | table: all of it as Markdown
"""
