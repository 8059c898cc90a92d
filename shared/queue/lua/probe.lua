-- PROBE, by an owner that has heard nothing for a while. ARGV: rid, next_seq.
-- Returns {state, attempt, finish, error, meta, tokens from next_seq, their logprobs}. State is `gone` for an
-- unknown request and `lost` for one whose entry no worker will ever see.
local rid, next_seq = ARGV[1], ARGV[2]
local h = redis.call('HMGET', req_key(rid), 'state', 'attempt', 'lane', 'eid', 'start_by_ms')
if not h[1] then return {'gone', 0, '', '', '', {}, {}} end

local function later(a, b)
  local a_ms, a_n = string.match(a, '(%d+)-(%d+)')
  local b_ms, b_n = string.match(b, '(%d+)-(%d+)')
  if a_ms ~= b_ms then return tonumber(a_ms) > tonumber(b_ms) end
  return tonumber(a_n) > tonumber(b_n)
end

-- In its lane, and either pending or ahead of what the group has read.
local function is_placed(lane, eid)
  if #redis.call('XRANGE', lane, eid, eid) == 0 then return false end
  if #redis.call('XPENDING', lane, GROUP, eid, eid, 1) > 0 then return true end
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', lane)) do
    for k = 1, #group, 2 do
      if group[k] == 'last-delivered-id' then return later(eid, group[k + 1]) end
    end
  end
  return false
end

local state = h[1]
if state == 'queued' and h[2] == '0' and now_ms() > tonumber(h[5]) then
  close(rid, 'error', 'queue_timeout')
  state = 'done'
elseif state ~= 'done' and not is_placed(lane_key(h[3]), h[4]) then
  state = 'lost'
end
local about = redis.call('HMGET', req_key(rid), 'finish', 'error', 'meta')
return {state, tonumber(h[2]), about[1] or '', about[2] or '', about[3] or '',
  redis.call('LRANGE', tok_key(rid), next_seq, -1), redis.call('LRANGE', logprob_key(rid), next_seq, -1)}
