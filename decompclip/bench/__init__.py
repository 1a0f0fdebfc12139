"""The leaderboard: every model of the zoo against every detector and repair, fitted and measured on different images."""
