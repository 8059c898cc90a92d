-- The live workers. ARGV: ttl_s. Returns {age of the report in ms, status (JSON)} of each.
local now, found = now_ms(), {}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'wks', now - ARGV[1] * 1000, '+inf')) do
  local h = redis.call('HMGET', PREFIX .. 'wk:' .. worker, 'at_ms', 'status')
  if h[1] then found[#found + 1] = {now - h[1], h[2]} end
end
return found
